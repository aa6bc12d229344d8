"""The measured parts of the pages, each a function from the result files to Markdown."""

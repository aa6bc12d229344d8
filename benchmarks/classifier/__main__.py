"""``python -m benchmarks.classifier``."""

from benchmarks.classifier.run import main

if __name__ == "__main__":
    main()

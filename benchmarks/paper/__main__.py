"""``python -m benchmarks.paper``."""

from benchmarks.paper.run import main

if __name__ == "__main__":
    main()

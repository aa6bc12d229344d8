"""``python -m benchmarks.faults``."""

from benchmarks.faults.cells import main

if __name__ == "__main__":
    main()

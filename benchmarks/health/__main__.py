"""``python -m benchmarks.health``."""

from benchmarks.health.run import main

if __name__ == "__main__":
    main()

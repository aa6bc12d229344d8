"""``python -m benchmarks.atlas``."""

from benchmarks.atlas.run import main

if __name__ == "__main__":
    main()

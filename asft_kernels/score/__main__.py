import sys

from asft_kernels.score import main

if __name__ == "__main__":
    sys.exit(main())

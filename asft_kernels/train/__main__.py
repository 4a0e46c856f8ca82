import sys

from asft_kernels.train import main

if __name__ == "__main__":
    sys.exit(main())

import sys

from asft_kernels.demo import main

if __name__ == "__main__":
    sys.exit(main())

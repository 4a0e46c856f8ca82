import sys

from asft_kernels.methods.dnpo import main

if __name__ == "__main__":
    sys.exit(main())

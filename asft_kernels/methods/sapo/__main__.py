import sys

from asft_kernels.methods.sapo import main

if __name__ == "__main__":
    sys.exit(main())

import sys

from asft_kernels.data_commands import main

if __name__ == "__main__":
    sys.exit(main())

"""A third-party back end that can be killed: dmaproof's disk, whose written blocks are in a file.

Run with the path to listen on and the path of the file. QEMU keeps the file of in-flight requests.
"""

import sys

import unobserved

if __name__ == "__main__":
    sys.exit(unobserved.serve(sys.argv[1], "--device", f"blk:file={sys.argv[2]}"))

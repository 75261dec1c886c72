"""Run a module under eventlet, which patches Python before anything else is imported.

python -m integration.rpc.patched MODULE [ARGUMENT ...]
"""

import sys

import eventlet


def main() -> None:
    eventlet.monkey_patch()
    import runpy

    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

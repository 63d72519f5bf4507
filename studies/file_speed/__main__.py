"""The three measurements of this package, one after another, at their defaults or with ``--quick``."""

import subprocess
import sys

from ..common.arguments import parse, parser_of

if __name__ == "__main__":
    arguments = parse(parser_of("file_speed", sys.modules[__name__].__doc__), None)
    for part in ("shrink", "extract_memory", "triplets"):
        print(f"{part} …", flush=True)
        command = [sys.executable, "-m", f"studies.file_speed.{part}"]
        subprocess.run(command + ["--quick"] * arguments.quick, check=True)

"""Whether what a program of this folder runs is there, before it writes anything."""
import os
import shutil


def require_built(parser, flag, program):
    """Ends with the parser's error unless `program`, the value of `flag`, can be run."""
    if shutil.which(program) is None:
        parser.error(f"{flag} {program}: cannot be run; is it built? make {os.path.normpath(program)}")

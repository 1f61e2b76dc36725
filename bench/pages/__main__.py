"""`python -m bench.pages`: every page and plot again, from the stored records."""

import argparse

from bench.pages.report import write_all

parser = argparse.ArgumentParser(prog="python -m bench.pages", description=__doc__)
parser.add_argument("--no-plots", action="store_true", help="pages only")
for path in write_all(plots=not parser.parse_args().no_plots):
    print(path)

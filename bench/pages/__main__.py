"""`python -m bench.pages`: every page and plot again, from the stored records."""

from bench.pages.report import main

raise SystemExit(main())

"""`python -m bench.gate --base REVISION`."""

from bench.gate.compare import main

raise SystemExit(main())

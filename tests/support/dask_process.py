"""A scheduler and its one worker in a process of their own, to be killed: `python -m tests.support.dask_process`."""

import sys

import distributed

with distributed.LocalCluster(
    n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0", protocol="tcp"
) as cluster:
    print(cluster.scheduler_address, flush=True)
    sys.stdin.read()

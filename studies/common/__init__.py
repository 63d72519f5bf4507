"""What the studies share: results that can be resumed, grids of rates, worker processes, tables and figures."""

"""The controlled experiment of docs/evidence.md: problems made here, models of random weights, tables and figures."""

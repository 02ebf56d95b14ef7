"""Several sites in one process, on public or simulated data: simulation, demo, sweeps, attacks, phantoms."""

"""The commands people run; the only place that knows Hydra."""

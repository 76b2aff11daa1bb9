"""fleet: the control plane and the operator's command line; see docs/architecture.md."""

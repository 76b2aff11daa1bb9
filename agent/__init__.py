"""agent: the daemon on the box. It installs, activates, serves and reports; see docs/architecture.md."""

"""runtimes: one interface over the libraries that run models; see docs/architecture.md."""

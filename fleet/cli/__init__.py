"""The operator's command line: `sluice`. Entry: main.py; docs/cli.md describes every command."""

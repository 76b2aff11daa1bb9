"""The wire contract: generated stubs below sluice.api."""

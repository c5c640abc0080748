"""sdbatch: tables of prompts in, pictures out, each exactly once."""

__version__ = "0.1.0"

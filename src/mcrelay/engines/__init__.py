"""Engines: the packet's way through one worker. `base` is their contract; each other module is one engine."""

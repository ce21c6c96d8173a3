"""What runs on the device, and what it means: one file per kernel, each with its plain meaning."""

"""The listener beside a PACS: what comes in is queued, run through a chain of bundles, and stored back."""

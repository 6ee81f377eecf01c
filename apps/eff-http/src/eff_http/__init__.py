"""What the servers of eff share: JSON bodies with limits, errors, server-sent events, keys, static pages and shutdown."""

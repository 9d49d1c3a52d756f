"""Speed against limits, measured side by side in one run; not packaged."""

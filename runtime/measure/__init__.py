"""What is known of bundles at work: times, memory, parity, and the machine they run on."""

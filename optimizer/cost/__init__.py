"""What serving costs: a roofline of prefill and decode by position, dense against DSA."""

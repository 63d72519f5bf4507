"""Which rule places a tight budget best? Many short runs at once, on one frozen BERT."""

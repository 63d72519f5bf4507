"""A configured run or sweep, and the tasks they train on."""

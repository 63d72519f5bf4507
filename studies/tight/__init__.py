"""Where should a budget below one rank a layer go?"""

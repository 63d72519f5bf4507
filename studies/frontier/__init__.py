"""Can one run answer every budget?"""

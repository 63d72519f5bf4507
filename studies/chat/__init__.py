"""Does choosing ranks help a real language model that learns a chat task?"""

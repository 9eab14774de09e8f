"""What the tests share: real ranks in real processes, and a count of the collectives they really issued."""

"""Is micro-batch x accumulation x ranks the same update as the whole batch?"""

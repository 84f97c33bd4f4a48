"""Which configuration reaches the batch the user asked for, fits, and is fastest?"""

"""What several tests share: references that answers are compared with."""

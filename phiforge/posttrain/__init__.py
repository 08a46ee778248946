"""Post-training data: pivotal tokens and the preference pairs made from them."""

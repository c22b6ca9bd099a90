"""Running a model: tokenizers and chat templates here; loading, generating and measuring beside them."""

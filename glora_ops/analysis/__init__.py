"""How clients stand to each other and to the mean, and pictures of it."""

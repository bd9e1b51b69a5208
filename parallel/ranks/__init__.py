"""How ranks find out who they are, meet, agree and part."""

"""What must survive: peewee models, transactions and migrations."""

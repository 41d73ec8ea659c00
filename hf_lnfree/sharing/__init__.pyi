from .card import write_card as write_card
from .push import push_run as push_run

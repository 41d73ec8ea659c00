from .attribution import write_attribution as write_attribution
from .entropy import write_entropy_page as write_entropy_page
from .finish import describe_run as describe_run
from .finish import finish_run as finish_run
from .removal import write_removal_report as write_removal_report
from .study import write_study_report as write_study_report

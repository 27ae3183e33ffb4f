/*
 * A stand-in for Pyxis on the local cluster: a SPANK plugin that gives each task of
 * `srun --container-image=...` a root file system of its own, in which nothing of the machine is
 * but what the image holds and what is mounted.
 *
 * An image is a text file. A line is the path of a file or folder of this machine that the image
 * holds, a variable that it sets (NAME=VALUE), or a comment (#). What it holds cannot be written.
 * /proc, /sys and /dev are those of the node; /tmp is empty and writable. All mounts are made in the
 * task's mount namespace and end with it: the machine keeps nothing.
 *
 * As with Pyxis, a mount whose source is missing and an image that does not exist end the task, the
 * image's variables win over the job's unless --container-env names them, and the working directory
 * is the root if --container-workdir does not say.
 *
 * plugstack.conf: required /path/stand_in.so root=/empty/folder log=/file
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pwd.h>
#include <sched.h>
#include <slurm/slurm.h>
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

SPANK_PLUGIN(pyxis, 1);

#define LINE_BYTES 8192

enum option { IMAGE, MOUNTS, WORKDIR, ENVIRONMENT, NAME, MOUNT_HOME, NO_MOUNT_HOME, WRITABLE, READ_ONLY, IGNORED };

static char *given[IGNORED + 1]; /* by option; a flag is "" */
static const char *log_file, *root;

static int remember(int option, const char *text, int remote)
{
	(void)remote;
	free(given[option]);
	given[option] = strdup(text ? text : "");
	return given[option] ? 0 : -1;
}

/* Entrypoints and user ids have no meaning here: there is no shell of the image before the task. */
static struct spank_option options[] = {
	{"container-image", "IMAGE", "[pyxis stand-in] file that describes the image", 1, IMAGE, remember},
	{"container-mounts", "SRC:DST[:FLAGS],...", "[pyxis stand-in] bind mounts", 1, MOUNTS, remember},
	{"container-workdir", "PATH", "[pyxis stand-in] working directory", 1, WORKDIR, remember},
	{"container-env", "NAME,...", "[pyxis stand-in] variables that win over the image's", 1, ENVIRONMENT, remember},
	{"container-name", "NAME", "[pyxis stand-in] ignored: no container outlives a task", 1, NAME, remember},
	{"container-mount-home", NULL, "[pyxis stand-in] mount the home folder", 0, MOUNT_HOME, remember},
	{"no-container-mount-home", NULL, "[pyxis stand-in] do not (default)", 0, NO_MOUNT_HOME, remember},
	{"container-writable", NULL, "[pyxis stand-in] files can be made in the root", 0, WRITABLE, remember},
	{"container-readonly", NULL, "[pyxis stand-in] they cannot (default)", 0, READ_ONLY, remember},
	{"container-remap-root", NULL, "[pyxis stand-in] ignored", 0, IGNORED, remember},
	{"no-container-remap-root", NULL, "[pyxis stand-in] ignored", 0, IGNORED, remember},
	{"container-entrypoint", NULL, "[pyxis stand-in] ignored", 0, IGNORED, remember},
	{"no-container-entrypoint", NULL, "[pyxis stand-in] ignored", 0, IGNORED, remember},
};

int slurm_spank_init(spank_t spank, int count, char *arguments[])
{
	for (int i = 0; i < count; i++) {
		if (strncmp(arguments[i], "root=", 5) == 0)
			root = arguments[i] + 5;
		else if (strncmp(arguments[i], "log=", 4) == 0)
			log_file = arguments[i] + 4;
	}
	for (size_t i = 0; i < sizeof options / sizeof *options; i++)
		if (spank_option_register(spank, &options[i]) != ESPANK_SUCCESS) {
			slurm_error("pyxis: couldn't register option --%s", options[i].name);
			return -1;
		}
	return 0;
}

static int fail(const char *what, const char *path)
{
	slurm_error("pyxis:     [ERROR] %s: %s: %s", what, path, strerror(errno));
	slurm_error("pyxis: couldn't start container");
	return -1;
}

/* Make the folders above a path, and all of it if `whole`. */
static int make_folders(const char *path, int whole)
{
	char folder[PATH_MAX];
	struct stat status;
	if (snprintf(folder, sizeof folder, "%s", path) >= (int)sizeof folder) {
		errno = ENAMETOOLONG;
		return -1;
	}
	for (char *slash = strchr(folder + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
		*slash = '\0';
		if (stat(folder, &status) && mkdir(folder, 0755) && errno != EEXIST)
			return -1;
		*slash = '/';
	}
	return whole && stat(folder, &status) && mkdir(folder, 0755) && errno != EEXIST ? -1 : 0;
}

/* Show `source` of the machine as `target` of the container. */
static int bind_mount(const char *source, const char *target, int is_read_only)
{
	char inside[PATH_MAX];
	struct stat status;
	int is_folder;
	if (stat(source, &status))
		return fail("enroot-mount: failed to mount", source);
	is_folder = S_ISDIR(status.st_mode);
	if (snprintf(inside, sizeof inside, "%s%s", root, target) >= (int)sizeof inside) {
		errno = ENAMETOOLONG;
		return fail("enroot-mount: failed to mount", target);
	}
	if (make_folders(inside, is_folder))
		return fail("enroot-mount: no mount point", target);
	if (!is_folder && stat(inside, &status)) {
		int file = open(inside, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);
		if (file < 0)
			return fail("enroot-mount: no mount point", target);
		close(file);
	}
	if (mount(source, inside, NULL, MS_BIND | MS_REC, NULL))
		return fail("enroot-mount: failed to mount", source);
	if (is_read_only && mount(NULL, inside, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL))
		return fail("enroot-mount: failed to protect", target);
	return 0;
}

/* Repeat a symbolic link such as /bin -> usr/bin; the folder that it leads to is held as well. */
static int copy_link(const char *path)
{
	char inside[PATH_MAX], leads_to[PATH_MAX];
	ssize_t length = readlink(path, leads_to, sizeof leads_to - 1);
	if (length < 0 || snprintf(inside, sizeof inside, "%s%s", root, path) >= (int)sizeof inside)
		return fail("cannot be read", path);
	leads_to[length] = '\0';
	if (make_folders(inside, 0) || (symlink(leads_to, inside) && errno != EEXIST))
		return fail("cannot be linked", path);
	return 0;
}

/* Call `use` for each line of the image that counts, without its end. */
static int read_image(spank_t spank, int (*use)(spank_t, char *))
{
	char line[LINE_BYTES];
	FILE *image = fopen(given[IMAGE], "re");
	int result = 0;
	if (!image) {
		slurm_error("pyxis: container start failed with error code: 1");
		slurm_error("pyxis: printing enroot log file:");
		slurm_error("pyxis:     [ERROR] No such file or directory: %s", given[IMAGE]);
		slurm_error("pyxis: couldn't start container");
		return -1;
	}
	while (result == 0 && fgets(line, sizeof line, image)) {
		line[strcspn(line, "\n")] = '\0';
		if (line[0] != '\0' && line[0] != '#')
			result = use(spank, line);
	}
	fclose(image);
	return result;
}

static int hold(spank_t spank, char *line)
{
	struct stat status;
	(void)spank;
	if (line[0] != '/')
		return 0;
	if (lstat(line, &status))
		return fail("held by the image", line);
	return S_ISLNK(status.st_mode) ? copy_link(line) : bind_mount(line, line, 1);
}

/* Whether --container-env names a variable. */
static int is_from_outside(const char *name)
{
	size_t length = strlen(name);
	for (const char *at = given[ENVIRONMENT]; at; at = strchr(at, ',')) {
		at += *at == ',';
		if (strncmp(at, name, length) == 0 && (at[length] == ',' || at[length] == '\0'))
			return 1;
	}
	return 0;
}

static int set_variable(spank_t spank, char *line)
{
	char *equals = strchr(line, '=');
	if (line[0] == '/' || !equals)
		return 0;
	*equals = '\0';
	/* Without overwriting, what --container-env names keeps the job's value, if it has one. */
	spank_err_t error = spank_setenv(spank, line, equals + 1, !is_from_outside(line));
	if (error == ESPANK_SUCCESS || error == ESPANK_ENV_EXISTS)
		return 0;
	slurm_error("pyxis: couldn't set %s: %s", line, spank_strerror(error));
	return -1;
}

/* SRC[:DST[:FLAG[+FLAG...]]],...; of the flags `ro` counts. */
static int mount_all(void)
{
	char *rest = given[MOUNTS] ? strdup(given[MOUNTS]) : NULL, *all = rest, *entry, *flag;
	int result = 0, is_read_only;
	while (result == 0 && (entry = strsep(&rest, ",")) != NULL) {
		char *source = strsep(&entry, ":"), *target = strsep(&entry, ":");
		target = target ? target : source;
		for (is_read_only = 0; (flag = strsep(&entry, "+")) != NULL;)
			is_read_only |= strcmp(flag, "ro") == 0;
		if (source[0] != '/' || target[0] != '/') {
			slurm_error("pyxis: --container-mounts: invalid format: %s:%s", source, target);
			result = -1;
		} else {
			result = bind_mount(source, target, is_read_only);
		}
	}
	free(all);
	return result;
}

static int mount_home(spank_t spank)
{
	uid_t user;
	struct passwd *entry;
	if (!given[MOUNT_HOME])
		return 0;
	if (spank_get_item(spank, S_JOB_UID, &user) != ESPANK_SUCCESS || !(entry = getpwuid(user))) {
		slurm_error("pyxis: couldn't find the home folder");
		return -1;
	}
	return bind_mount(entry->pw_dir, entry->pw_dir, 0);
}

/* Say in the cluster's log which task is in which container. */
static int write_log(spank_t spank)
{
	char node[HOST_NAME_MAX + 1] = "", line[PATH_MAX + 256];
	uint32_t job = 0, step = 0, task = 0;
	struct stat space;
	int log, length;
	if (!log_file)
		return 0;
	gethostname(node, sizeof node - 1);
	if (spank_get_item(spank, S_JOB_ID, &job) || spank_get_item(spank, S_JOB_STEPID, &step) ||
	    spank_get_item(spank, S_TASK_GLOBAL_ID, &task) || stat("/proc/self/ns/mnt", &space))
		return fail("no facts for", log_file);
	length = snprintf(line, sizeof line, "%u.%u task %u on %s in %s, mount namespace %lu\n", job, step, task,
			  node, given[IMAGE], (unsigned long)space.st_ino);
	if ((log = open(log_file, O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0644)) < 0 ||
	    write(log, line, length) != length)
		return fail("cannot be written", log_file);
	close(log);
	return 0;
}

/* Leave the machine's root for the container's. */
static int enter(void)
{
	int flags = MS_REMOUNT | MS_BIND | (given[WRITABLE] ? 0 : MS_RDONLY);
	if (mount(NULL, root, NULL, flags, NULL) || chdir(root) || syscall(SYS_pivot_root, ".", ".") ||
	    umount2(".", MNT_DETACH) || chdir("/"))
		return fail("cannot be entered", root);
	return 0;
}

int slurm_spank_task_init_privileged(spank_t spank, int count, char *arguments[])
{
	char temporary[PATH_MAX];
	(void)count;
	(void)arguments;
	if (!given[IMAGE])
		return 0;
	if (!root) {
		slurm_error("pyxis: plugstack.conf names no root=");
		return -1;
	}
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
	    mount("container", root, "tmpfs", 0, "mode=0755"))
		return fail("no mount namespace", root);
	if (read_image(spank, hold) || bind_mount("/proc", "/proc", 0) || bind_mount("/sys", "/sys", 0) ||
	    bind_mount("/dev", "/dev", 0))
		return -1;
	snprintf(temporary, sizeof temporary, "%s/tmp", root);
	if (make_folders(temporary, 1) || mount("temporary", temporary, "tmpfs", 0, "mode=1777"))
		return fail("no folder", "/tmp");
	if (mount_all() || mount_home(spank) || read_image(spank, set_variable) || write_log(spank))
		return -1;
	return enter();
}

int slurm_spank_task_init(spank_t spank, int count, char *arguments[])
{
	const char *folder = given[WORKDIR] ? given[WORKDIR] : "/";
	(void)spank;
	(void)count;
	(void)arguments;
	if (!given[IMAGE])
		return 0;
	if (chdir(folder))
		return fail("couldn't change to the working directory", folder);
	return 0;
}

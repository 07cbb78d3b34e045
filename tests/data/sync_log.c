// Preloaded into a program: appends to $SYNC_LOG what it asks of the file system, in order: `sync PATH`, `rename FROM TO`,
// `mkdir PATH`. Compiled by tests/it/durable.rs.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void say(const char *format, ...) {
    static int log = -1;
    char line[3 * PATH_MAX];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    pthread_mutex_lock(&lock);
    if (log < 0 && getenv("SYNC_LOG")) log = open(getenv("SYNC_LOG"), O_WRONLY | O_CREAT | O_APPEND, 0666);
    if (log >= 0 && write(log, line, length) != length) abort();
    pthread_mutex_unlock(&lock);
}

static const char *absolute(const char *path, char *out) {
    if (path[0] == '/' || !getcwd(out, PATH_MAX)) return path;
    strncat(strcat(out, "/"), path, PATH_MAX - strlen(out) - 1);
    return out;
}

static void synced(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return;
    path[length] = 0;
    say("sync %s\n", path);
}

int fsync(int fd) {
    int (*next)(int) = dlsym(RTLD_NEXT, "fsync");
    synced(fd);
    return next(fd);
}

int fdatasync(int fd) {
    int (*next)(int) = dlsym(RTLD_NEXT, "fdatasync");
    synced(fd);
    return next(fd);
}

int rename(const char *from, const char *to) {
    int (*next)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    char a[PATH_MAX], b[PATH_MAX];
    int result = next(from, to);
    if (result == 0) say("rename %s %s\n", absolute(from, a), absolute(to, b));
    return result;
}

int mkdir(const char *path, mode_t mode) {
    int (*next)(const char *, mode_t) = dlsym(RTLD_NEXT, "mkdir");
    char a[PATH_MAX];
    int result = next(path, mode);
    if (result == 0) say("mkdir %s\n", absolute(path, a));
    return result;
}

/*
 * Records, in order, what a process does to the files below one folder.
 *
 * Loaded with LD_PRELOAD. EDGEWARD_RECORD_ROOT is the folder (a real path),
 * EDGEWARD_RECORD_FILE takes the record. Each entry is
 *     u8 kind, u16 path length, u64 offset, u64 size, u32 data length, path, data
 * in the machine's byte order, without padding. Kinds: 'c' created, 'w' written,
 * 't' truncated to `size`, 'a' space allocated up to `size`, 's' synced, 'u' unlinked,
 * 'r' renamed (data: the new path), 'm' mapped writable and shared, 'd' folder made,
 * 'x' folder removed, 'l' linked (data: the new path), 'y' symbolic link made (data: its target).
 *
 * One lock is held around each call and its entry: the record's order is the kernel's.
 * Files of the folder are never opened here: closing one would drop SQLite's POSIX locks.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_length;
static int record = -1;

#define REAL(name) ((__typeof__(&name))find_real(#name))

static void *find_real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (found == NULL) abort();
    return found;
}

__attribute__((constructor)) static void start(void) {
    const char *folder = getenv("EDGEWARD_RECORD_ROOT"), *file = getenv("EDGEWARD_RECORD_FILE");
    if (folder == NULL || file == NULL || strlen(folder) >= sizeof root) return;
    record = REAL(open)(file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (record < 0) abort();
    strcpy(root, folder);
    root_length = strlen(root);
    /* Children would write into the same record. */
    unsetenv("LD_PRELOAD");
}

static void put(const void *bytes, size_t size) {
    const char *next = bytes;
    while (size > 0) {
        ssize_t done = REAL(write)(record, next, size);
        if (done < 0) abort();
        next += done;
        size -= (size_t)done;
    }
}

static void note(char kind, const char *path, uint64_t offset, uint64_t size, const void *data,
                 uint32_t data_length) {
    int kept = errno;
    struct {
        uint8_t kind;
        uint16_t path_length;
        uint64_t offset, size;
        uint32_t data_length;
    } __attribute__((packed)) head = {(uint8_t)kind, (uint16_t)strlen(path), offset, size,
                                      data_length};
    put(&head, sizeof head);
    put(path, head.path_length);
    if (data_length > 0) put(data, data_length);
    errno = kept;
}

static int is_watched_path(const char *path) {
    return record >= 0 && strncmp(path, root, root_length) == 0 &&
           (path[root_length] == '/' || path[root_length] == 0);
}

/* Put the path of an open file into `path`; 0 where it is not below the root. */
static int is_watched(int fd, char path[PATH_MAX]) {
    char link[64];
    int kept = errno;
    if (record < 0 || fd == record) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    errno = kept;
    if (length < 0) return 0;
    path[length] = 0;
    return is_watched_path(path);
}

static int open_noted(int folder, const char *given, int flags, mode_t mode) {
    struct stat before;
    char path[PATH_MAX];
    if (record < 0 || !(flags & (O_CREAT | O_TRUNC)))
        return REAL(openat)(folder, given, flags, mode);
    pthread_mutex_lock(&lock);
    int kept = errno;
    int was_there = fstatat(folder, given, &before, 0) == 0;
    errno = kept;
    int fd = REAL(openat)(folder, given, flags, mode);
    if (fd >= 0 && is_watched(fd, path)) {
        if (!was_there) note('c', path, 0, 0, NULL, 0);
        else if (flags & O_TRUNC) note('t', path, 0, 0, NULL, 0);
    }
    pthread_mutex_unlock(&lock);
    return fd;
}

#define MODE_OF(flags)                                      \
    mode_t mode = 0;                                        \
    if ((flags) & O_CREAT) {                                \
        va_list rest;                                       \
        va_start(rest, flags);                              \
        mode = (mode_t)va_arg(rest, unsigned int);          \
        va_end(rest);                                       \
    }

int open(const char *path, int flags, ...) {
    MODE_OF(flags)
    return open_noted(AT_FDCWD, path, flags, mode);
}

int openat(int folder, const char *path, int flags, ...) {
    MODE_OF(flags)
    return open_noted(folder, path, flags, mode);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    char path[PATH_MAX];
    if (!is_watched(fd, path)) return REAL(pwrite)(fd, data, size, offset);
    pthread_mutex_lock(&lock);
    ssize_t done = REAL(pwrite)(fd, data, size, offset);
    if (done > 0) note('w', path, (uint64_t)offset, (uint64_t)done, data, (uint32_t)done);
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t write(int fd, const void *data, size_t size) {
    char path[PATH_MAX];
    if (!is_watched(fd, path)) return REAL(write)(fd, data, size);
    pthread_mutex_lock(&lock);
    ssize_t done = REAL(write)(fd, data, size);
    /* After the call the position is the end of what was written, with O_APPEND too. */
    if (done > 0) {
        uint64_t offset = (uint64_t)(lseek(fd, 0, SEEK_CUR) - done);
        note('w', path, offset, (uint64_t)done, data, (uint32_t)done);
    }
    pthread_mutex_unlock(&lock);
    return done;
}

int ftruncate(int fd, off_t size) {
    char path[PATH_MAX];
    if (!is_watched(fd, path)) return REAL(ftruncate)(fd, size);
    pthread_mutex_lock(&lock);
    int rc = REAL(ftruncate)(fd, size);
    if (rc == 0) note('t', path, 0, (uint64_t)size, NULL, 0);
    pthread_mutex_unlock(&lock);
    return rc;
}

int posix_fallocate(int fd, off_t offset, off_t size) {
    char path[PATH_MAX];
    if (!is_watched(fd, path)) return REAL(posix_fallocate)(fd, offset, size);
    pthread_mutex_lock(&lock);
    int rc = REAL(posix_fallocate)(fd, offset, size);
    if (rc == 0) note('a', path, 0, (uint64_t)(offset + size), NULL, 0);
    pthread_mutex_unlock(&lock);
    return rc;
}

int fallocate(int fd, int mode, off_t offset, off_t size) {
    char path[PATH_MAX];
    if (!is_watched(fd, path)) return REAL(fallocate)(fd, mode, offset, size);
    pthread_mutex_lock(&lock);
    int rc = REAL(fallocate)(fd, mode, offset, size);
    if (rc == 0) note(mode == 0 ? 'a' : 'm', path, 0, (uint64_t)(offset + size), NULL, 0);
    pthread_mutex_unlock(&lock);
    return rc;
}

static int sync_noted(int fd, int (*real)(int)) {
    char path[PATH_MAX];
    if (!is_watched(fd, path)) return real(fd);
    pthread_mutex_lock(&lock);
    int rc = real(fd);
    if (rc == 0) note('s', path, 0, 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    return rc;
}

int fsync(int fd) { return sync_noted(fd, REAL(fsync)); }

int fdatasync(int fd) { return sync_noted(fd, REAL(fdatasync)); }

int unlink(const char *path) {
    if (!is_watched_path(path)) return REAL(unlink)(path);
    pthread_mutex_lock(&lock);
    int rc = REAL(unlink)(path);
    if (rc == 0) note('u', path, 0, 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    return rc;
}

/* Put the path of `name` in an open folder into `path`; 0 where that is not below the root. */
static int is_watched_at(int folder, const char *name, char path[PATH_MAX]) {
    if (name[0] == '/' || folder == AT_FDCWD) {
        if (strlen(name) >= PATH_MAX) return 0;
        strcpy(path, name);
        return is_watched_path(path);
    }
    if (!is_watched(folder, path) || strlen(path) + strlen(name) + 2 > PATH_MAX) return 0;
    strcat(strcat(path, "/"), name);
    return 1;
}

int unlinkat(int folder, const char *name, int flags) {
    char path[PATH_MAX];
    if (!is_watched_at(folder, name, path)) return REAL(unlinkat)(folder, name, flags);
    pthread_mutex_lock(&lock);
    int rc = REAL(unlinkat)(folder, name, flags);
    if (rc == 0) note(flags & AT_REMOVEDIR ? 'x' : 'u', path, 0, 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    return rc;
}

int mkdir(const char *path, mode_t mode) {
    if (!is_watched_path(path)) return REAL(mkdir)(path, mode);
    pthread_mutex_lock(&lock);
    int rc = REAL(mkdir)(path, mode);
    if (rc == 0) note('d', path, 0, 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    return rc;
}

int rmdir(const char *path) {
    if (!is_watched_path(path)) return REAL(rmdir)(path);
    pthread_mutex_lock(&lock);
    int rc = REAL(rmdir)(path);
    if (rc == 0) note('x', path, 0, 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    return rc;
}

int link(const char *from, const char *to) {
    if (!is_watched_path(to)) return REAL(link)(from, to);
    pthread_mutex_lock(&lock);
    int rc = REAL(link)(from, to);
    if (rc == 0) note('l', from, 0, 0, to, (uint32_t)strlen(to));
    pthread_mutex_unlock(&lock);
    return rc;
}

int symlink(const char *target, const char *path) {
    if (!is_watched_path(path)) return REAL(symlink)(target, path);
    pthread_mutex_lock(&lock);
    int rc = REAL(symlink)(target, path);
    if (rc == 0) note('y', path, 0, 0, target, (uint32_t)strlen(target));
    pthread_mutex_unlock(&lock);
    return rc;
}

ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    char path[PATH_MAX];
    if (!is_watched(out, path)) return REAL(sendfile)(out, in, offset, size);
    pthread_mutex_lock(&lock);
    off_t from = offset != NULL ? *offset : lseek(in, 0, SEEK_CUR);
    off_t at = lseek(out, 0, SEEK_CUR);
    ssize_t done = REAL(sendfile)(out, in, offset, size);
    for (ssize_t told = 0; told < done;) {
        char piece[65536];
        size_t wanted = (size_t)(done - told) < sizeof piece ? (size_t)(done - told) : sizeof piece;
        ssize_t got = pread(in, piece, wanted, from + told);
        if (got <= 0) abort();
        note('w', path, (uint64_t)(at + told), (uint64_t)got, piece, (uint32_t)got);
        told += got;
    }
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size,
                        unsigned int flags) {
    char path[PATH_MAX];
    if (is_watched(out, path)) {
        errno = EXDEV; /* Callers copy by other means then. */
        return -1;
    }
    return REAL(copy_file_range)(in, from, out, to, size, flags);
}

int rename(const char *from, const char *to) {
    if (!is_watched_path(from)) return REAL(rename)(from, to);
    pthread_mutex_lock(&lock);
    int rc = REAL(rename)(from, to);
    if (rc == 0) note('r', from, 0, 0, to, (uint32_t)strlen(to));
    pthread_mutex_unlock(&lock);
    return rc;
}

void *mmap(void *address, size_t size, int access, int flags, int fd, off_t offset) {
    char path[PATH_MAX];
    if (fd >= 0 && (access & PROT_WRITE) && (flags & MAP_SHARED) && is_watched(fd, path)) {
        pthread_mutex_lock(&lock);
        note('m', path, (uint64_t)offset, (uint64_t)size, NULL, 0);
        pthread_mutex_unlock(&lock);
    }
    return REAL(mmap)(address, size, access, flags, fd, offset);
}

#ifdef __GLIBC__
/* glibc's names for the same calls; on a machine of 64 bits the types are the same too. */
int open64(const char *path, int flags, ...) {
    MODE_OF(flags)
    return open_noted(AT_FDCWD, path, flags, mode);
}

int openat64(int folder, const char *path, int flags, ...) {
    MODE_OF(flags)
    return open_noted(folder, path, flags, mode);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    return pwrite(fd, data, size, offset);
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) {
    return sendfile(out, in, offset, size);
}

int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }

int posix_fallocate64(int fd, off64_t offset, off64_t size) {
    return posix_fallocate(fd, offset, size);
}

int fallocate64(int fd, int mode, off64_t offset, off64_t size) {
    return fallocate(fd, mode, offset, size);
}

void *mmap64(void *address, size_t size, int access, int flags, int fd, off64_t offset) {
    return mmap(address, size, access, flags, fd, offset);
}
#endif
